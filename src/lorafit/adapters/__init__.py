"""Adapters on disk."""

from lorafit.adapters.load import load_adapter
from lorafit.adapters.peft import AdapterRecord, read_record, save_adapter

__all__ = ["AdapterRecord", "load_adapter", "read_record", "save_adapter"]
