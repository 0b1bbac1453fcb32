"""The demo pair: two tiny models and the trainer that made them.

Knows nothing of sessions, brokers or engines; the rest of the project only reads `demo.pair`.
"""
