"""What is handed over: written, mixed, and used."""
