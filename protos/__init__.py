"""Generated gRPC stubs of the slosserve.v1 contract (`make protos`)."""
