"""The paper's claims: CPO beside its baselines, on the generated world and on rated text."""
