"""Fields over space that a network learns: radiance and occupancy, and how they are rendered."""
