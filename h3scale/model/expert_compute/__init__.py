"""What experts compute, behind one door: rows sorted by expert in, rows out; `choose` gives the backend that a recipe names."""

from h3scale.model.expert_compute.registry import NAMES, Backend, check_fits, choose

__all__ = ["NAMES", "Backend", "check_fits", "choose"]
