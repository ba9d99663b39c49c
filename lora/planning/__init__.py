"""What an adapter would cost, before it is trained."""
