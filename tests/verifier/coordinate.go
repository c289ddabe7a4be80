package main

import (
	"cmp"
	"fmt"
	"strconv"
	"strings"
)

// Coordinate names one record for ever: a change by epoch, LSN of its commit and ordinal, and the part of it.
type Coordinate struct {
	Epoch   uint32
	LSN     uint64
	Ordinal uint64
	Part    uint32
}

func (c Coordinate) String() string {
	text := fmt.Sprintf("%d:%X/%X:%d", c.Epoch, c.LSN>>32, c.LSN&0xffffffff, c.Ordinal)
	if c.Part != 0 {
		text += fmt.Sprintf(" part %d", c.Part)
	}
	return text
}

// Compare orders coordinates as changes were committed.
func (c Coordinate) Compare(other Coordinate) int {
	return cmp.Or(
		cmp.Compare(c.Epoch, other.Epoch),
		cmp.Compare(c.LSN, other.LSN),
		cmp.Compare(c.Ordinal, other.Ordinal),
		cmp.Compare(c.Part, other.Part),
	)
}

// parsePosition reads `epoch:X/Y:ordinal`, which does not say the part.
func parsePosition(text string) (Coordinate, error) {
	fields := strings.Split(text, ":")
	if len(fields) != 3 {
		return Coordinate{}, fmt.Errorf("%q is not a position", text)
	}
	high, low, _ := strings.Cut(fields[1], "/")
	epoch, err1 := strconv.ParseUint(fields[0], 10, 32)
	upper, err2 := strconv.ParseUint(high, 16, 32)
	lower, err3 := strconv.ParseUint(low, 16, 32)
	ordinal, err4 := strconv.ParseUint(fields[2], 10, 64)
	if err := cmp.Or(err1, err2, err3, err4); err != nil {
		return Coordinate{}, fmt.Errorf("%q is not a position: %w", text, err)
	}
	return Coordinate{Epoch: uint32(epoch), LSN: upper<<32 | lower, Ordinal: ordinal}, nil
}

// parseEntryID reads a Redis entry id, which is made of the coordinate.
func parseEntryID(id string) (Coordinate, error) {
	high, low, _ := strings.Cut(id, "-")
	time, err1 := strconv.ParseUint(high, 10, 64)
	sequence, err2 := strconv.ParseUint(low, 10, 64)
	if err := cmp.Or(err1, err2); err != nil {
		return Coordinate{}, fmt.Errorf("%q is not an entry id: %w", id, err)
	}
	return Coordinate{
		Epoch:   uint32(time >> 56),
		LSN:     time & (1<<56 - 1),
		Ordinal: sequence >> 8,
		Part:    uint32(sequence & 0xff),
	}, nil
}
