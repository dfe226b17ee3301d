"""Language models whose embedding tables live outside: a transformer, an LSTM, any Hugging Face causal LM."""
