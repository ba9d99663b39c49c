"""What several scripts and tests share: models and data out of packages, and bundles made of them."""
