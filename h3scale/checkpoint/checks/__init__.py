"""What verify looks at, one file a subject. A check is a function that yields findings; what it raises is a finding too."""
