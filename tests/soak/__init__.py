"""The soak: a real server, tenants who use it well, and attackers who do not.

`python -m tests.soak --minutes 10 --seed 1`. In rounds: attacks are dealt from a shuffled deck
while the residents of two tenants draw; then there is a truce, in which the server must be as it
was before. What was seen is judged by `judge`; docs/attacks.md says what is attacked.
"""
