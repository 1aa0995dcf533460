"""How a site joins: the protocol both sides speak, invites, keys, names.  Loads no torch."""
