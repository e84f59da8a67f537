"""What a sweep will take, before its first trial: measured steps, simulated trials."""
