"""The pages of the report, one a file: functions from recorded data to a `Page`."""
