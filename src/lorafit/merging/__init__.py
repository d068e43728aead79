"""Writing a tuned model as one file, and proving that it is the model that was trained."""

from lorafit.merging.certificate import Certificate, certify
from lorafit.merging.plan import Plan, apply, plan
from lorafit.merging.verify import verify

__all__ = ["Certificate", "Plan", "apply", "certify", "plan", "verify"]
