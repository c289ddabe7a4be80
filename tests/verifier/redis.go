package main

import (
	"context"
	"fmt"

	"github.com/redis/go-redis/v9"
)

// page is how many entries are read at once.
const page = 1000

// RedisLog reads the streams of the ledger's tables.
type RedisLog struct {
	client  *redis.Client
	decoder *Decoder
	streams []string
	// last has the id of the last entry read from each stream.
	last    map[string]string
	records []Record
}

// OpenRedis connects.
func OpenRedis(url, prefix string, tables []Table, decoder *Decoder) (*RedisLog, error) {
	options, err := redis.ParseURL(url)
	if err != nil {
		return nil, err
	}
	log := &RedisLog{client: redis.NewClient(options), decoder: decoder, last: map[string]string{}}
	for _, table := range tables {
		log.streams = append(log.streams, sinkName(prefix, table))
	}
	return log, nil
}

// Close disconnects.
func (l *RedisLog) Close() { _ = l.client.Close() }

// CatchUp reads what is new, and gives all records so far.
func (l *RedisLog) CatchUp(ctx context.Context) ([]Record, error) {
	for _, stream := range l.streams {
		for {
			start := "-"
			if last := l.last[stream]; last != "" {
				start = "(" + last
			}
			entries, err := l.client.XRangeN(ctx, stream, start, "+", page).Result()
			if err != nil {
				return nil, fmt.Errorf("%s: %w", stream, err)
			}
			for _, entry := range entries {
				l.last[stream] = entry.ID
				record, err := l.decode(stream, entry)
				if err != nil {
					return nil, fmt.Errorf("%s %s: %w", stream, entry.ID, err)
				}
				l.records = append(l.records, record)
			}
			if len(entries) < page {
				break
			}
		}
	}
	return l.records, nil
}

func (l *RedisLog) decode(stream string, entry redis.XMessage) (Record, error) {
	field := func(name string) string {
		text, _ := entry.Values[name].(string)
		return text
	}
	coordinate, err := parseEntryID(entry.ID)
	if err != nil {
		return Record{}, err
	}
	position, err := parsePosition(field("position"))
	if err != nil {
		return Record{}, err
	}
	if position.Part = coordinate.Part; position != coordinate {
		return Record{}, fmt.Errorf("the id says %s, the field position %s", coordinate, position)
	}
	key := field("key")
	// What stands for none.
	if key == "default" {
		key = ""
	}
	value := []byte(field("value"))
	change, err := l.decoder.Decode(value)
	if err != nil {
		return Record{}, err
	}
	return Record{
		Place:      stream + " " + entry.ID,
		Lane:       stream,
		Coordinate: coordinate,
		Key:        key,
		Value:      value,
		Change:     change,
	}, nil
}
