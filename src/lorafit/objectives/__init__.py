"""Losses: functions of (model, batch)."""
