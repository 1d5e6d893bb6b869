"""Commands that are no stage: report, results table, uploads, measurements."""
