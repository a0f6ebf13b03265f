"""The step inside training loops of other libraries: docs/integrations.md. Each module needs its library installed."""
