"""What a bundle looks at, shown and tested."""
