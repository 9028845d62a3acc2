"""Files that outlive the process: written whole or not at all, and read only where they are what was written."""
