"""Can we promise: a ledger per replica and the admission decision over it."""
