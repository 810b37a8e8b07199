"""slosctl and the local stack."""
