"""Private runs: plan, budget, ledger, certificate."""
