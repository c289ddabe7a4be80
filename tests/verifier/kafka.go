package main

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"strconv"
	"strings"

	"github.com/twmb/franz-go/pkg/kadm"
	"github.com/twmb/franz-go/pkg/kerr"
	"github.com/twmb/franz-go/pkg/kgo"
)

// KafkaLog reads the topics of the ledger's tables from their beginning, as a read_committed consumer sees them.
type KafkaLog struct {
	client  *kgo.Client
	admin   *kadm.Client
	decoder *Decoder
	topics  []string
	// next has the offset to go on with in each partition.
	next    map[string]map[int32]int64
	records []Record
}

// OpenKafka connects.
func OpenKafka(bootstrap, prefix string, tables []Table, decoder *Decoder) (*KafkaLog, error) {
	client, err := kgo.NewClient(
		kgo.SeedBrokers(strings.Split(bootstrap, ",")...),
		kgo.FetchIsolationLevel(kgo.ReadCommitted()),
		// A partition may end with a marker, and only by it is known that the end is reached.
		kgo.KeepControlRecords(),
	)
	if err != nil {
		return nil, err
	}
	log := &KafkaLog{client: client, admin: kadm.NewClient(client), decoder: decoder, next: map[string]map[int32]int64{}}
	for _, table := range tables {
		log.topics = append(log.topics, sinkName(prefix, table))
	}
	return log, nil
}

// Close disconnects.
func (l *KafkaLog) Close() { l.client.Close() }

// sinkName is the name of a table's topic or stream.
func sinkName(prefix string, table Table) string {
	allowed := func(r rune) rune {
		switch {
		case 'a' <= r && r <= 'z', 'A' <= r && r <= 'Z', '0' <= r && r <= '9', strings.ContainsRune("._-", r):
			return r
		}
		return '_'
	}
	return strings.Map(allowed, prefix+"."+table.Schema+"."+table.Name)
}

// CatchUp reads up to what is committed now, and gives all records so far.
func (l *KafkaLog) CatchUp(ctx context.Context) ([]Record, error) {
	ends, err := l.ends(ctx)
	if err != nil {
		return nil, err
	}
	for {
		for topic, partitions := range ends {
			maps.DeleteFunc(partitions, func(partition int32, end int64) bool { return l.next[topic][partition] >= end })
		}
		maps.DeleteFunc(ends, func(_ string, partitions map[int32]int64) bool { return len(partitions) == 0 })
		if len(ends) == 0 {
			return l.records, nil
		}
		fetches := l.client.PollFetches(ctx)
		if err := fetches.Err(); err != nil {
			return nil, err
		}
		for _, record := range fetches.Records() {
			l.next[record.Topic][record.Partition] = record.Offset + 1
			if record.Attrs.IsControl() {
				continue
			}
			decoded, err := l.decode(record)
			if err != nil {
				return nil, fmt.Errorf("%s[%d]@%d: %w", record.Topic, record.Partition, record.Offset, err)
			}
			l.records = append(l.records, decoded)
		}
	}
}

// ends gives the end of what is committed in each partition, and has partitions that were not there before read from their start.
func (l *KafkaLog) ends(ctx context.Context) (map[string]map[int32]int64, error) {
	starts, err := l.admin.ListStartOffsets(ctx, l.topics...)
	if err != nil {
		return nil, err
	}
	committed, err := l.admin.ListCommittedOffsets(ctx, l.topics...)
	if err != nil {
		return nil, err
	}
	ends := map[string]map[int32]int64{}
	committed.Each(func(end kadm.ListedOffset) {
		if end.Err != nil {
			// A topic that is not there holds nothing, and what it lacks will be said.
			if !errors.Is(end.Err, kerr.UnknownTopicOrPartition) {
				err = fmt.Errorf("%s[%d]: %w", end.Topic, end.Partition, end.Err)
			}
			return
		}
		start, found := starts.Lookup(end.Topic, end.Partition)
		if !found || start.Err != nil {
			return
		}
		if l.next[end.Topic] == nil {
			l.next[end.Topic] = map[int32]int64{}
		}
		if _, reading := l.next[end.Topic][end.Partition]; !reading {
			l.next[end.Topic][end.Partition] = start.Offset
			l.client.AddConsumePartitions(map[string]map[int32]kgo.Offset{
				end.Topic: {end.Partition: kgo.NewOffset().At(start.Offset)},
			})
		}
		if ends[end.Topic] == nil {
			ends[end.Topic] = map[int32]int64{}
		}
		ends[end.Topic][end.Partition] = end.Offset
	})
	return ends, err
}

func (l *KafkaLog) decode(record *kgo.Record) (Record, error) {
	change, err := l.decoder.Decode(record.Value)
	if err != nil {
		return Record{}, err
	}
	headers := map[string]string{}
	for _, header := range record.Headers {
		headers[header.Key] = string(header.Value)
	}
	coordinate, err := parsePosition(headers["meander-position"])
	if err != nil {
		return Record{}, err
	}
	if text, split := headers["meander-part"]; split {
		part, err := strconv.ParseUint(text, 10, 8)
		if err != nil || part == 0 {
			return Record{}, fmt.Errorf("the header meander-part says %q", text)
		}
		coordinate.Part = uint32(part)
	}
	if text := headers["meander-commit-time"]; text != strconv.FormatInt(change.CommitMicros, 10) {
		return Record{}, fmt.Errorf("the header meander-commit-time says %q, the value %d", text, change.CommitMicros)
	}
	return Record{
		Place:      fmt.Sprintf("%s[%d]@%d", record.Topic, record.Partition, record.Offset),
		Lane:       fmt.Sprintf("%s[%d]", record.Topic, record.Partition),
		Coordinate: coordinate,
		Key:        string(record.Key),
		Value:      record.Value,
		Millis:     record.Timestamp.UnixMilli(),
		Change:     change,
	}, nil
}
