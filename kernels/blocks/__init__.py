"""What the formats of dense blocks share: layout, verbs, naive twins. ``bsr`` and ``panel`` are such formats."""
