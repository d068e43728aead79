"""Adapters on disk."""

from lorafit.adapters.peft import AdapterRecord, load_adapter, read_record, save_adapter

__all__ = ["AdapterRecord", "load_adapter", "read_record", "save_adapter"]
