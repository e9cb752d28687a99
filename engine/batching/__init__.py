"""Many requests, one device: who is admitted, who shares a call, and what a call costs."""
