"""Any causal language model that Hugging Face's transformers can load from a folder or a GGUF file.

The decoder becomes the body, its embedding and its output layer become the tables. The body's names are those
of the stock model (`model.layers.0.self_attn.q_proj`, `transformer.h.0.attn.c_attn`), so adapters trained
here load there. After loading, the seam is checked: logits through the tables must equal the model's own. A
model that scales or caps its logits, or needs token ids inside the decoder, fails that check and is refused.

Dropout of pretrained models is off: it would draw from torch's global generator.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext, redirect_stderr
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from fedlm.errors import DataError
from fedlm.models.attention import LONGEST_PLAIN
from fedlm.models.base import LanguageModel
from fedlm.models.packages import packaged_model
from fedlm.models.weights import Array, set_weights, weights

if TYPE_CHECKING:
    from tokenizers import Tokenizer

# Settings of transformers that change logits after the output layer, with their neutral values.
_LOGIT_SETTINGS: Mapping[str, tuple[float | None, ...]] = {
    "final_logit_softcapping": (None, 0.0),
    "logit_scale": (None, 1.0),
    "logits_scaling": (None, 1.0),
    "lm_head_multiplier": (None, 1.0),
}
_PROBE_TOLERANCE = 1e-3  # of the largest logit; float32 rounding is a thousand times smaller


class PretrainedModel(LanguageModel):
    """A transformers causal LM behind the seam of `LanguageModel`.

    Arguments:
        source: The transformers model (`...ForCausalLM`), float32; its parts are moved, not copied.

    Raises:
        DataError: A model without plain input and output embeddings.
    """

    def __init__(self, source: Any) -> None:
        rows, output = source.get_input_embeddings(), source.get_output_embeddings()
        if not isinstance(rows, nn.Embedding) or not isinstance(output, nn.Linear):
            raise DataError(f"{type(source).__name__} has no plain input and output embedding; use another model")
        tied = output.weight is rows.weight
        super().__init__(rows.weight, None if tied else output.weight, output.bias)
        self.architecture: dict[str, Any] = source.config.to_dict()
        self.max_length: int | None = getattr(source.config, "max_position_embeddings", None)
        self.embed_scale = float(getattr(rows, "embed_scale", 1.0))
        source.set_input_embeddings(nn.Identity())
        _replace_conv1d(source.base_model)
        self._decoder = source.base_model_prefix
        self.add_module(self._decoder, source.base_model)
        self.train(self.training)

    def body(self, x: Tensor, mask: Tensor | None = None, noise: Tensor | None = None) -> Tensor:
        """Map embedded inputs (B, T, D) to hidden states (B, T, D); see `LanguageModel.body`.

        Raises:
            DataError: T is longer than the positions that the model was made for.
        """
        if self.max_length is not None and x.shape[1] > self.max_length:
            raise DataError(f"a sequence of {x.shape[1]} tokens; the model has {self.max_length} positions; cut it")
        plain = x.shape[1] <= LONGEST_PLAIN
        with sdpa_kernel(SDPBackend.MATH) if plain else nullcontext():
            decoded = self.get_submodule(self._decoder)(inputs_embeds=x, attention_mask=mask, use_cache=False)
        return decoded.last_hidden_state  # type: ignore[no-any-return]

    def embed(self, rows: Tensor) -> Tensor:
        """Scale rows (..., D) as the model's own embedding layer does (Gemma: by sqrt(D))."""
        return rows if self.embed_scale == 1 else rows * self.embed_scale

    def train(self, mode: bool = True) -> PretrainedModel:
        """Set the mode of this module; the decoder stays in evaluation mode, without dropout."""
        super().train(mode)
        self.get_submodule(self._decoder).eval()
        return self


@dataclass(frozen=True, eq=False)
class PretrainedSource:
    """A pretrained model that has been read once and makes any number of models, which share its weights.

    Reading a GGUF file takes tens of seconds, making a model from what was read takes none.

    Arguments:
        architecture: `PretrainedModel.architecture`.
        weights: Every weight by name; never written into.
        tokenizer: The model's own.
        vocabulary_size: V, rows of the embedding table.
        max_length: Tokens in the longest sequence, or None.
    """

    architecture: Mapping[str, Any]
    weights: Mapping[str, Array]
    tokenizer: Tokenizer
    vocabulary_size: int
    max_length: int | None

    @classmethod
    def read(cls, source: str | Path) -> PretrainedSource:
        """Read a folder or GGUF file; raises DataError like `load_pretrained`."""
        model, tokenizer = load_pretrained(source)
        return cls(model.architecture, weights(model), tokenizer, model.vocabulary_size, model.max_length)

    def model(self) -> LanguageModel:
        """Return a new model over the shared, frozen weights; `thaw` what trains."""
        model = empty_pretrained(self.architecture)
        set_weights(model, self.weights)
        return model


def load_pretrained(source: str | Path) -> tuple[PretrainedModel, Tokenizer]:
    """Load a model and its tokenizer; nothing is fetched from a network.

    Arguments:
        source: A folder as `save_pretrained` writes it, with a tokenizer, a GGUF file, or the shorthand of a package.

    Returns:
        The model, float32, and the tokenizer, whose ids are below the model's `vocabulary_size`.

    Raises:
        DataError: Missing or broken files, missing weights, or a model that does not fit the seam.
    """
    path = packaged_model(str(source)) or Path(source)
    if path.suffix == ".gguf" and path.is_file():
        folder, options = path.parent, {"gguf_file": path.name}
    elif (path / "config.json").is_file():
        folder, options = path, {}
    else:
        raise DataError(f"no model at '{source}'; give a folder with a config.json, or a GGUF file")
    with quietly(), as_data_error(source):
        loaded = _load_model(folder, options)
        tokenizer = _load_tokenizer(folder, options)
    _refuse_transformed_logits(source, loaded.config)
    tokens = _probe_tokens(loaded.config.vocab_size)
    with torch.no_grad():
        wanted = loaded.eval()(input_ids=tokens, use_cache=False).logits  # (1, T, V)
    model = PretrainedModel(loaded)
    _check_seam(source, model, tokens, wanted)
    if tokenizer.get_vocab_size() > model.vocabulary_size:
        raise DataError(
            f"'{source}': the tokenizer has {tokenizer.get_vocab_size()} entries, the model "
            f"{model.vocabulary_size}; use the tokenizer that belongs to the model"
        )
    return model, tokenizer


def empty_pretrained(architecture: Mapping[str, Any]) -> LanguageModel:
    """Rebuild a model from its `architecture`, with uninitialised weights (`set_weights` gives it some).

    A worker needs neither the files nor the time to read them, and the memory stays untouched until views of
    shared memory replace it.

    Arguments:
        architecture: `PretrainedModel.architecture`, plain data that pickles and serialises to JSON.
    """
    from transformers import AutoConfig
    from transformers.initialization import no_init_weights

    config = AutoConfig.for_model(**architecture)
    with quietly(), no_init_weights():
        empty = _auto_model().from_config(config, dtype=torch.float32)
    empty.tie_weights()
    return PretrainedModel(empty)


def _auto_model() -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM


def _load_model(folder: Path, options: Mapping[str, str]) -> Any:
    model, report = _auto_model().from_pretrained(
        folder, dtype=torch.float32, local_files_only=True, output_loading_info=True, **options
    )
    if absent := sorted(report["missing_keys"]) + sorted(map(str, report["mismatched_keys"])):
        raise DataError(f"'{folder}' lacks the weight {absent[0]} ({len(absent)} in all); get the whole model")
    return model


def _load_tokenizer(folder: Path, options: Mapping[str, str]) -> Tokenizer:
    from tokenizers import Tokenizer
    from transformers import AutoTokenizer

    file = folder / "tokenizer.json"
    if not options and file.is_file():
        return Tokenizer.from_file(str(file))
    fast = AutoTokenizer.from_pretrained(folder, local_files_only=True, **options)
    return fast.backend_tokenizer


def _refuse_transformed_logits(source: str | Path, config: Any) -> None:
    for setting, neutral in _LOGIT_SETTINGS.items():
        if (value := getattr(config, setting, None)) not in neutral:
            raise DataError(f"'{source}' transforms its logits ({setting} = {value}); use another model")


def _probe_tokens(vocabulary_size: int) -> Tensor:
    return torch.arange(1, 6).mul(7919).remainder(vocabulary_size)[None]  # (1, 5)


@torch.no_grad()
def _check_seam(source: str | Path, model: PretrainedModel, tokens: Tensor, wanted: Tensor) -> None:
    found = model.hidden(tokens) @ model.output_table.T  # (1, T, V)
    if model.output_bias is not None:
        found = found + model.output_bias
    error = float((found - wanted).abs().max() / wanted.abs().max().clamp(min=1e-6))
    if not error <= _PROBE_TOLERANCE:
        raise DataError(
            f"'{source}' ({model.architecture['model_type']}) computes its logits in another way than "
            f"hidden x table (relative difference {error:.1g}); use another model"
        )


def _replace_conv1d(decoder: nn.Module) -> None:
    """Turn GPT-2's transposed `Conv1D` into `nn.Linear`, the one kind that adapters and others meet here."""
    from transformers.pytorch_utils import Conv1D

    for name, module in list(decoder.named_modules()):
        if isinstance(module, Conv1D):
            linear = nn.Linear(module.nx, module.nf, device="meta")
            linear.weight = nn.Parameter(module.weight.detach().T.contiguous())  # (out, in)
            linear.bias = module.bias
            decoder.set_submodule(name, linear)


@contextmanager
def as_data_error(source: str | Path) -> Iterator[None]:
    """Turn whatever a loader raises at broken files into one line."""
    try:
        yield
    except DataError:
        raise
    except ImportError as error:
        raise DataError(
            f"'{source}' needs a package that is not installed ({_line(error)}); try fedlm[gguf]"
        ) from error
    except Exception as error:
        raise DataError(f"'{source}' cannot be loaded ({_line(error)}); check that the files are whole") from error


def _line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


@contextmanager
def quietly() -> Iterator[None]:
    """Keep transformers' progress bars and advice off the terminal."""
    from transformers.utils import logging as transformers_logging

    logging: Any = transformers_logging
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with redirect_stderr(StringIO()):  # the bar of the GGUF conversion obeys no switch
            yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
