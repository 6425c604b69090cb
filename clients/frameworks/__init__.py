"""What trainers for other frameworks than PyTorch share, and the inner parts of Keras' and JAX's."""
