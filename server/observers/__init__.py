"""What watches the rounds: each sees the events of a run in order, and none knows another."""
