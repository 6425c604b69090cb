"""From a trained model to one that is exported, small, tuned, and in use."""
