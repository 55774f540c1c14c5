"""What a run tells while it goes on: bars, tables, trackers and memory."""
