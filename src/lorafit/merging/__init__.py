"""Writing a tuned model as one file, and proving that it is the model that was trained."""

from lorafit.merging.certificate import Certificate, certify
from lorafit.merging.exact import Plan, apply, plan, verify

__all__ = ["Certificate", "Plan", "apply", "certify", "plan", "verify"]
