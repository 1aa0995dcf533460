"""Preference data: two forms, readers, split by question, partition over clients."""
