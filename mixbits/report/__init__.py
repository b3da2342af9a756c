"""What a run tells: tables, card, page, charts, verdict."""
