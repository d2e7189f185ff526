"""Scripts that measure speed: each prints a table and writes a JSON file with its samples and conditions."""
