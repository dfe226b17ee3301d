"""Audit of a run from within: canary devices, and what an attacker finds out about them, as an epsilon."""

from fedlm.audit.canaries import Canaries
from fedlm.audit.gaussian_bound import GaussianBound, gaussian_bound
from fedlm.audit.one_run import OneRunBound, one_run_bound
from fedlm.audit.report import AuditReport, TextReport, View
from fedlm.audit.scores import Products, products, scores, strengths

__all__ = [
    "AuditReport",
    "Canaries",
    "GaussianBound",
    "OneRunBound",
    "Products",
    "TextReport",
    "View",
    "gaussian_bound",
    "one_run_bound",
    "products",
    "scores",
    "strengths",
]
