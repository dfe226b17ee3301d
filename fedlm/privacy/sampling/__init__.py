"""Who takes part: samplers of cohorts, the secret that they draw from, the ledger of participations."""
