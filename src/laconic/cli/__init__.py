"""The laconic command, one short file a verb."""
