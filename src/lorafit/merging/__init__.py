"""Writing a tuned model as one file or directory, and proving what it is."""

from lorafit.merging.certificate import Certificate, certify
from lorafit.merging.directory import DirectoryCertificate, DirectoryPlan, apply_directory, plan_directory
from lorafit.merging.plan import Plan, apply, plan
from lorafit.merging.run import HeldOut
from lorafit.merging.verify import verify

__all__ = [
    "Certificate",
    "DirectoryCertificate",
    "DirectoryPlan",
    "HeldOut",
    "Plan",
    "apply",
    "apply_directory",
    "certify",
    "plan",
    "plan_directory",
    "verify",
]
