"""fedalign: federated alignment of one language model to groups that disagree.

The science both sides share: configuration, the wire contract, data formats, objectives, weight
rules, metrics, the ledger and the report.  Nothing in this package imports ``server``, ``clients``
or ``simulations``, and importing it loads neither torch nor Flower.
"""

__version__ = "0.1.0"
