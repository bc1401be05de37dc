"""Small models with their data, each rebuilt by one command and used by the demo."""
