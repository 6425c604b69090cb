"""The link engine: real nodes, over gRPC and mutual TLS."""
