"""What trainers of other frameworks than PyTorch share, and parts of Keras' and JAX's."""
