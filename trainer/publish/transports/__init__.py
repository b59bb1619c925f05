"""Brings weights to a server: as files, as an adapter, or broadcast tensor by tensor."""
