"""The virtual fleet: profiles of device classes, a million devices as arrays, who takes part in a round."""

from simulations.fleet.virtual import fleet_maker

__all__ = ["fleet_maker"]
