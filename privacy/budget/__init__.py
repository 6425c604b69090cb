"""What releases cost: events, epsilon, calibration."""
