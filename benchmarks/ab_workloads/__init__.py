"""What `fasttune bench ab` runs on both revisions, each in processes of its own."""
