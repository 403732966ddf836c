"""What learning is. No Ray, no HTTP. Read rl/loop.py first."""
