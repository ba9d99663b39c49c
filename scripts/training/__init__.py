"""How the adapters of the demo were trained."""
