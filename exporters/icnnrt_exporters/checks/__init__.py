"""What must hold before an export, and what is compared after it."""
