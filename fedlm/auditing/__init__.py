"""Audit of a run from within: canary devices, and what an attacker finds out about them, as an epsilon."""

from fedlm.auditing.canaries import Canaries
from fedlm.auditing.gaussian_bound import GaussianBound, gaussian_bound
from fedlm.auditing.one_run import OneRunBound, one_run_bound
from fedlm.auditing.report import AuditReport, TextReport, View
from fedlm.auditing.scores import Products, products, scores, strengths

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
