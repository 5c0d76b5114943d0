"""Text that models read: files, documents, windows, near-duplicates."""
